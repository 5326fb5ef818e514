"""Time and memory of whole meta-gradients, innerloop against its peers: `python -m benchmarks
--help`."""
