"""Recipes with small models."""

from dataclasses import replace

from leanmim.recipes import MAE, SIMMIM

SMALL = {
    "mae-vit": replace(
        MAE,
        model="vit_tiny_patch16_224",
        model_kwargs={"depth": 3},
        input_size=(96,),
        decoder_depth=2,
        decoder_width=512,
        decoder_heads=16,
    ),
    "simmim-vit": replace(SIMMIM, model="vit_tiny_patch16_224", model_kwargs={"depth": 3}, input_size=(96,)),
    "simmim-swin": replace(
        SIMMIM, model="swin_tiny_patch4_window7_224", model_kwargs={"embed_dim": 24}, input_size=(128,)
    ),
}
