"""The engine: requests become pictures. The only home of torch, diffusers and transformers."""
