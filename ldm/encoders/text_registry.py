"""Published text models: what they are, their licence, where their weights come from; and how a model may read text."""

from __future__ import annotations

from dataclasses import dataclass

LAYOUTS = ("joint", "separate")  # of several chunks: one start and end token for all, or their own
PADS = ("eos", "zero")  # what fills a caption up: the end token again, or zero
LAYERS = ("last", "penultimate")  # whose output is taken


@dataclass(frozen=True)
class TextModel:
    """A published model whose text tower conditions images.

    name, source, licence: what it is called, where the authors give its weights, on what terms.
    files: what its folder needs; of names joined by "|" one.
    arch: open_clip's name of the architecture ("": its folder says it).
    """

    name: str
    licence: str
    source: str
    files: tuple[str, ...]
    arch: str = ""


TRANSFORMERS = ("config.json", "model.safetensors|pytorch_model.bin")
OPEN_CLIP = ("open_clip_config.json", "open_clip_model.safetensors|open_clip_pytorch_model.bin")

REGISTRY = {
    model.name: model
    for model in (
        # Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision". ViT-L/14 is the
        # text encoder of Stable Diffusion 1.x
        TextModel(
            name="clip-vit-l-14", arch="ViT-L-14-quickgelu", licence="MIT", files=TRANSFORMERS,
            source="https://huggingface.co/openai/clip-vit-large-patch14",
        ),
        TextModel(
            name="clip-vit-b-32", arch="ViT-B-32-quickgelu", licence="MIT", files=TRANSFORMERS,
            source="https://huggingface.co/openai/clip-vit-base-patch32",
        ),
        # Huang et al. 2023, "A visual-language foundation model for pathology image analysis using medical Twitter"
        TextModel(
            name="plip", arch="ViT-B-32-quickgelu", files=TRANSFORMERS,
            licence="none stated; its model card allows research and no deployed use",
            source="https://huggingface.co/vinid/plip",
        ),
        # Ikezogwo et al. 2023, "Quilt-1M: One Million Image-Text Pairs for Histopathology"
        TextModel(
            name="quiltnet-b-32", arch="ViT-B-32", files=OPEN_CLIP,
            licence="MIT; its model card: a research output",
            source="https://huggingface.co/wisdomik/QuiltNet-B-32",
        ),
        # Zhang et al. 2023, "BiomedCLIP: a multimodal biomedical foundation model pretrained from fifteen million
        # scientific image-text pairs". Its text tower is a BERT, whose config.json its folder lacks: that of
        # https://huggingface.co/microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract
        TextModel(
            name="biomedclip", licence="MIT; its model card: for research only",
            files=(*OPEN_CLIP, "tokenizer.json", "config.json (of BiomedNLP-BiomedBERT-base-uncased-abstract)"),
            source="https://huggingface.co/microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        ),
    )
}  # fmt: skip
