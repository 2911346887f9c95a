"""First stages: convolutional autoencoders with a KL or VQ latent, their losses and their training stage."""
