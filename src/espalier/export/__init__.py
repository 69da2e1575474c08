"""A plain network out: ONNX, torch.export and safetensors, each checked against torch.

What is written loads with onnxruntime or torch alone; a JSON card beside it says how.
"""

from espalier.export.exported import FORMATS as FORMATS
from espalier.export.exported import Exported as Exported
from espalier.export.exported import export as export
from espalier.export.modes import deployed as deployed
from espalier.export.onnx import to_onnx as to_onnx
