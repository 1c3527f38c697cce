"""Files for the device, and the proof that they answer as the network does in PyTorch.

`pipeline.py`, `cli.py` and the public names use it; it knows nothing of training, data or the report.
"""
