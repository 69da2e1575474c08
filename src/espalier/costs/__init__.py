"""What candidates cost: counted exactly, measured on a runtime, or predicted from measured pieces."""

from espalier.costs.cost import Builder as Builder
from espalier.costs.cost import CodeCost as CodeCost
from espalier.costs.cost import Cost as Cost
from espalier.costs.count import Count as Count
from espalier.costs.count import count as count
from espalier.costs.counts import Counts as Counts
from espalier.costs.layers import layers as layers
from espalier.costs.measured import MeasuredLatency as MeasuredLatency
from espalier.costs.onnx_file import price_onnx as price_onnx
from espalier.costs.pieces import UnitFamily as UnitFamily
from espalier.costs.predicted import PredictedLatency as PredictedLatency
from espalier.costs.runtime import BusyMachine as BusyMachine
from espalier.costs.runtime import OnnxRuntime as OnnxRuntime
from espalier.costs.tabulated import TabularCost as TabularCost
from espalier.costs.timing import Timing as Timing
