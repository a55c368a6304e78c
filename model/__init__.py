"""The network, its data, its training and its committed weights.

Data flow: MNIST (`data`) -> random distortions (`augment`) -> `train` -> `weights.safetensors` and `MODEL_CARD.md`.
Knows nothing of HTTP, of TorchServe or of the `handler` package.
"""
