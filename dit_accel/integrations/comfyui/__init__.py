"""Nodes for ComfyUI: a symbolic link to this folder in ComfyUI's `custom_nodes` makes them known there (docs/servers.md).

ComfyUI runs this file under a name of its own, so everything is imported from the installed package.
"""

from dit_accel.integrations.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
