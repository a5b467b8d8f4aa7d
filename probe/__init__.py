"""See and change the activations of models. Knows models, knows nothing of autoencoders."""
