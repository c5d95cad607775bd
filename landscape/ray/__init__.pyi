from .losses import ray_losses as ray_losses
