"""API keys: the keys file, authentication, and the limits of each key."""

from gateway.keys.authentication import ANONYMOUS, Caller, IssuedKey, Keys
from gateway.keys.stored import KeyLimits, StoredKey, keys_in_force, read_keys

__all__ = ["ANONYMOUS", "Caller", "IssuedKey", "KeyLimits", "Keys", "StoredKey", "keys_in_force", "read_keys"]
