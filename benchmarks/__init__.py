"""One file a claim: ours and a reference side by side; `python -m benchmarks NAME`."""
