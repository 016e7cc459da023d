"""The weights of an export in one file, each once, however many graphs read it.

The format of ONNX's external data: a graph names file, offset and length, and holds no weights itself, so that no graph meets the 2 GB
that a protobuf may have."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from .packages import needed

PAGE = 4096
"""Offsets are multiples of it: then a reader can map the file into memory."""
LEAST_BYTES = 1024
"""What is smaller stays in the graph."""


class WeightsFile:
    """Opened for writing; one tensor is in memory at a time."""

    def __init__(self, file: Path, names: Collection[str]) -> None:
        """`names`: the weights that are to be moved out; equal names mean equal tensors."""
        self.file = file
        self.names = frozenset(names)
        self._written: dict[str, Any] = {}
        file.touch(exist_ok=False)

    def write_graph(self, model: Any, file: Path) -> None:
        """An onnx_ir.Model, in the folder of the weights."""
        ir = needed("onnx_ir")
        for name, value in model.graph.initializers.items():
            if name in self.names and value.const_value.nbytes >= LEAST_BYTES:
                value.const_value = self._moved_out(name, value.const_value)
        for node in model.graph.all_nodes():
            node.metadata_props.clear()  # the exporter's stack traces, with this machine's paths
        ir.save(model, file)

    def _moved_out(self, name: str, tensor: Any) -> Any:
        if name not in self._written:
            content = tensor.tobytes()
            with self.file.open("ab") as stream:
                stream.write(bytes(-stream.tell() % PAGE))
                offset = stream.tell()
                stream.write(content)
            self._written[name] = needed("onnx_ir").ExternalTensor(
                self.file.name,
                offset,
                len(content),
                tensor.dtype,
                shape=tensor.shape,
                name=name,
                base_dir=self.file.parent,
            )
        return self._written[name]
