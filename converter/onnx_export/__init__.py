"""From weights and a plan to an ONNX folder: base graph, matching of MLPs and linears, one emitter per plan kind."""
