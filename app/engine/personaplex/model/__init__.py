"""The networks: language model, depformer and codec. Weights in, tensors with the row as axis 0 through."""
