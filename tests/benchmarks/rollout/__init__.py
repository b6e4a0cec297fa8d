"""How soon the gates of a rollout stop a worse variant, and how rarely an identical one."""
