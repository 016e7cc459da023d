"""A checkpoint as ONNX graphs: writing them (`command.py`), and acting with them (`onnx_policy.py`)."""
