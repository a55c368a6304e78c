"""The peers of this service in benchmarks: one small file each, written as a user of the tool would write it.

`stock_handler`, `saliency_handler` and `noop_handler` are handlers of TorchServe, each packed alone into an archive. The programs
`fastapi_app` and `mosec_app` share `captum_answers`. The service needs none of these, and none of them uses its handler.
"""
