"""More than one machine: build the image, check the manifests, simulate the autoscaler."""
