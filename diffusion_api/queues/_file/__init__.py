"""The inner parts of the queue as a folder (:mod:`diffusion_api.queues.file`)."""
