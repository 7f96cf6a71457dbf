"""From a checkpoint folder to an ONNX folder (`export`): the float graph, its MLPs and linears, ops in their place by
one emitter per plan kind.
"""
