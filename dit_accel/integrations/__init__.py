"""The operator in programs other than diffusers: as a plain function, as a kernel of vLLM-Omni, as nodes of ComfyUI."""
