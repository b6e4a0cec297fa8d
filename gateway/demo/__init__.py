"""The main job from end to end on one machine: quantize a small model, serve it, ask it."""
