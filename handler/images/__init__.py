"""Image files and arrays -> grey pixels (the trust boundary); preparations, from any image to what the network knows and back.

Knows nothing of HTTP, torch or TorchServe.
"""
