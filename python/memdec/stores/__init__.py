"""What lies on the disk: corpora, datastores, teacher distributions, memories, and the manifests that hold them
together."""
