"""Hugging Face folders: names, configs and safetensors."""
