"""API keys: the keys file, authentication, and the limits of each key."""

from gateway.keys.authentication import IssuedKey, Keys
from gateway.keys.caller import ANONYMOUS, Caller
from gateway.keys.stored import KeyLimits, StoredKey, keys_in_force, read_keys

__all__ = ["ANONYMOUS", "Caller", "IssuedKey", "KeyLimits", "Keys", "StoredKey", "keys_in_force", "read_keys"]
