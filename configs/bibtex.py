from cbmlc_jax import config as config_lib


def get_config(preset: str = ""):
    c = config_lib.base()
    c.data.name = "bibtex"
    c.preset = preset
    if preset == "fast":
        c.model.width = 64
        c.model.ffn_width = 128
    elif preset:
        raise config_lib.ConfigError(f"configs/bibtex.py has no preset {preset!r}")
    return c
