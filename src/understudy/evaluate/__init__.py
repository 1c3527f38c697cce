"""What a model is worth and what it costs; the training, the pipeline and the command line may import it.

- `metrics`: accuracy, calibration and fidelity of logits (numpy).
- `verdict`: intervals over seeds and images, and the student against the same student trained alone (numpy).
- `profile`: parameters, multiply-accumulates, memory and latency (torch).
- `gate`: the teacher is checked before it teaches (numpy).
- `suitability`: the methods are checked before they are used, and their shares of the gradient (torch).

Nothing is imported here, so that the three that need no torch load without it.
"""
