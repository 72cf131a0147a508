"""The offline side: data, networks, training, evaluation, and weights on disk."""
