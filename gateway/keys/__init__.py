"""API keys: the keys file, keys in the state database, authentication, and the limits of each key."""

from gateway.keys.authentication import ANONYMOUS, UNKNOWN_KEYS, Caller, IssuedKey, Keys
from gateway.keys.file import KeyFile
from gateway.keys.stored import KeyLimits, StoredKey, keys_in_force, read_keys

__all__ = [
    "ANONYMOUS",
    "UNKNOWN_KEYS",
    "Caller",
    "IssuedKey",
    "KeyFile",
    "KeyLimits",
    "Keys",
    "StoredKey",
    "keys_in_force",
    "read_keys",
]
