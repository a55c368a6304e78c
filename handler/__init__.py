"""All that runs inside a TorchServe worker.

One batch of requests flows through these modules, each of which knows only its own step:

    TorchServe row + headers
      -> request        which picture, which options: frozen values, or a client error for that row alone
      -> decode         image bytes -> grey pixels (the trust boundary)
      -> canonical      any picture -> the pixels that the network knows
      -> saliency       one forward for the batch; input gradients for the rows that ask
      -> drawing        maps and their pictures -> a PNG, for the rows that ask
      -> reply          JSON, npy or PNG bytes with their status and content type

`digit_handler` wires them into TorchServe's BaseHandler; `archive` loads and checks what the archive carries; `errors` is the
tree of errors that a client can get. This module imports nothing.
"""
