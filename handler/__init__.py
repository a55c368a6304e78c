"""All that runs inside a TorchServe worker.

One batch of requests flows through these modules, each of which knows only its own step:

    TorchServe row + headers
      -> request        which images, which options: frozen values, or a client error for that row alone
         kserve         the bodies of KServe's two protocols, taken apart for it
      -> prepare        all images of a request, ready for the network, or one error that names the bad ones; by
         decode           image bytes, nested numbers -> grey pixels (the trust boundary)
         arrays           .npy files, tensors -> grey pixels (the trust boundary)
         canonical        any image -> the pixels that the network knows, and the way back
      -> saliency       one forward for the batch; input gradients for the images that ask; by
         compiled_pass         forward and backward without autograd, as they were derived when the archive was packaged
         methods          how a map is made of gradients: one table, and the mathematics
      -> reply          JSON, npy or PNG bytes with their status and content type; by
         drawing          images and their maps -> a PNG

`saliency_handler` wires them into TorchServe's BaseHandler, whose worker receives by `worker_socket`; `memory` has it keep
and give back what it frees; `archive` loads and checks what the archive carries; `describe` lists what the service takes and
gives; `metrics` counts what happens; `errors` is the tree of errors that a client can get. This module imports nothing.
"""
