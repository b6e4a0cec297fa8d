"""Who may call, and how far a key reaches."""

from gateway.keys.authentication import Issued, Keys
from gateway.keys.caller import ANONYMOUS, Caller
from gateway.keys.stored import KeyLimits, StoredKey, keys_in_force, read_keys

__all__ = ["ANONYMOUS", "Caller", "Issued", "KeyLimits", "Keys", "StoredKey", "keys_in_force", "read_keys"]
