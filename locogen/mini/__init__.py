"""The embedded model: a small Stable Diffusion, the world it was trained on, and its trainer."""
