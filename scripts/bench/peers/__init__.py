"""What this service is compared with: one small file a peer, written as a user of each tool would write it.

`stock_handler`, `saliency_handler` and `noop_handler` are handlers of TorchServe, packed alone into an archive; `fastapi_app` and
`mosec_app` are programs, which share `captum_answers`. None of them is needed to run the service.
"""
