"""The shared vocabulary: what a deployment and a variant look like on disk. Imports nothing of ours."""
