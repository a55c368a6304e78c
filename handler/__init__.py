"""All that runs inside a TorchServe worker.

One batch of requests flows through these rooms, each of which knows only its own step:

    TorchServe row + headers
      -> protocol      Request: what was sent, what is asked; or a client error for that row alone
      -> preprocess    PreparedImage: pixels for the network, and the way back; by
         images          files and arrays -> grey pixels (the trust boundary); preparations
      -> gradients     Explanation: logits and saliency maps, one forward and one backward for the batch
      -> protocol      Reply: JSON, npy or PNG, with its status and headers; drawings by
         render          saliency maps -> PNG

`saliency_handler` wires them into TorchServe's BaseHandler; `torchserve` holds all that is changed in TorchServe's worker.
`runtime` checks and loads the archive, counts what happens, and bounds the allocator. `limits` holds every limit, `errors`
the tree of errors that a client can get. This module imports nothing.
"""
