"""What turns images into features: tile encoders and their registry, Inception, CLIP."""
