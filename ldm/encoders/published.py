"""The table of published tile encoders. Numbers are those of the authors' releases: model cards, repositories, papers.

`mpp` is the resolution that the authors trained for or recommend, with tiles of `tile_size` px; encoders of pictures of
any scale have none. An encoder that pools in two ways has a name for each, `-cls` where the class token alone is taken.
"""

from __future__ import annotations

from dataclasses import replace

from ldm.encoders.spec import EncoderSpec

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
OPTIMUS = {"mean": (0.707223, 0.578729, 0.703617), "std": (0.211883, 0.230117, 0.177517)}
HIBOU = {"mean": (0.7068, 0.5755, 0.722), "std": (0.195, 0.2316, 0.1816)}
LUNIT = {"mean": (0.70322989, 0.53606487, 0.66096631), "std": (0.21716536, 0.26081574, 0.20723464)}

SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
DYNAMIC = {"img_size": 224, "dynamic_img_size": True}
SCALED = {**DYNAMIC, "init_values": 1e-5}  # with layer scale
GIANT = {"img_size": 224, "init_values": 1e-5}

NC_ND = {"licence": "CC BY-NC-ND 4.0, gated: academic, non-commercial use", "gated": True, "non_commercial": True}
GPL_NC = {"licence": "GPL-3.0, for non-commercial academic purposes", "non_commercial": True}
OWKIN = {"licence": "Owkin non-commercial licence", "non_commercial": True}
LUNIT_NC = {"licence": "Lunit public licence, non-commercial research", "non_commercial": True}
KAIKO_NC = {"licence": "Kaiko non-commercial public licence", "non_commercial": True}
APACHE = {"licence": "Apache-2.0"}

HUB = "https://huggingface.co/"
LUNIT_HOME = "https://github.com/lunit-io/benchmark-ssl-pathology/releases/tag/pretrained-weights"
KAIKO_HOME = "https://github.com/kaiko-ai/towards_large_pathology_fms/releases/tag/0.0.1"
BIN = "pytorch_model.bin"


def _made(name: str, arch: str, dim: int, source: str, file: str = "model.safetensors", **own) -> EncoderSpec:
    """An encoder whose published transform is torchvision's on pictures."""
    return EncoderSpec(name=name, arch=arch, dim=dim, source=source, file=file, pillow=True, **own)


def table() -> dict[str, EncoderSpec]:
    """All published encoders by name.

    >>> len(table()) > 24
    True
    """
    vits16, vits8 = "vit_small_patch16_224", "vit_small_patch8_224"
    vitb16, vitb8, vitl16 = "vit_base_patch16_224", "vit_base_patch8_224", "vit_large_patch16_224"
    specs = [
        # Chen et al. 2024, "Towards a general-purpose foundation model for computational pathology"
        _made("uni", vitl16, 1024, HUB + "MahmoodLab/UNI", BIN, kwargs=SCALED, tile_size=256, interpolation="bilinear",
              tokens=14, **NC_ND),
        _made("uni2-h", "vit_giant_patch14_224", 1536, HUB + "MahmoodLab/UNI2-h", BIN, tile_size=256,
              kwargs={**DYNAMIC, **SWIGLU, "patch_size": 14, "depth": 24, "num_heads": 24, "embed_dim": 1536,
                      "init_values": 1e-5, "mlp_ratio": 2.66667 * 2, "no_embed_class": True, "reg_tokens": 8},
              interpolation="bilinear", tokens=16, **NC_ND),
        # Lu et al. 2024, "A visual-language foundation model for computational pathology"; features before projection
        _made("conch", vitb16, 512, HUB + "MahmoodLab/CONCH", BIN, kwargs={**DYNAMIC, "img_size": 448},
              pooling="attention", tile_size=448, input_size=448, tokens=28, **OPENAI, **NC_ND),
        # Ding et al. 2024, "Multimodal whole slide foundation model for pathology" (TITAN), whose tile encoder it is
        _made("conch-v1.5", vitl16, 768, HUB + "MahmoodLab/conchv1_5", "pytorch_model_vision.bin", pooling="attention",
              kwargs={**DYNAMIC, "img_size": 448, "init_values": 1.0}, tile_size=512, input_size=448,
              interpolation="bilinear", positions="scale", tokens=28, **NC_ND),
        # Vorontsov et al. 2024, "A foundation model for clinical-grade computational pathology and rare cancers
        # detection"; Zimmermann et al. 2024, "Virchow2: Scaling Self-Supervised Mixed Magnification Models in
        # Pathology"
        _made("virchow", "vit_huge_patch14_224", 2560, HUB + "paige-ai/Virchow", BIN, pooling="token+avg", tokens=16,
              kwargs={**SCALED, **SWIGLU, "mlp_ratio": 5.3375, "global_pool": ""}, gated=True, **APACHE),
        _made("virchow2", "vit_huge_patch14_224", 2560, HUB + "paige-ai/Virchow2", BIN, pooling="token+avg", tokens=16,
              kwargs={**SCALED, **SWIGLU, "mlp_ratio": 5.3375, "reg_tokens": 4, "global_pool": ""}, **NC_ND),
        # Saillard et al. 2024, H-optimus-0; Bioptimus 2025, H-optimus-1
        _made("h-optimus-0", "vit_giant_patch14_reg4_dinov2", 1536, HUB + "bioptimus/H-optimus-0", BIN, kwargs=GIANT,
              tokens=16, gated=True, **OPTIMUS, **APACHE),
        _made("h-optimus-1", "vit_giant_patch14_reg4_dinov2", 1536, HUB + "bioptimus/H-optimus-1", BIN, kwargs=GIANT,
              tokens=16, **OPTIMUS, **NC_ND),
        # Filiot et al. 2025, "Distilling foundation models for robust and efficient models in digital pathology"
        _made("h0-mini", "vit_base_patch14_reg4_dinov2", 1536, HUB + "bioptimus/H0-mini", BIN, pooling="token+avg",
              kwargs={**GIANT, **SWIGLU, "mlp_ratio": 5.33334, "global_pool": ""}, tokens=16, **OPTIMUS, **NC_ND),
        # Xu et al. 2024, "A whole-slide foundation model for digital pathology from real-world data"
        _made("prov-gigapath", "vit_giant_patch14_dinov2", 1536, HUB + "prov-gigapath/prov-gigapath", BIN,
              kwargs={**GIANT, "patch_size": 16, "mlp_ratio": 5.33334}, tile_size=256, resize=256, tokens=14,
              licence="Apache-2.0; its card: for research alone", gated=True, non_commercial=True),
        _made("gigapath-flash", vits16, 384, HUB + "prov-gigapath/prov-gigapath-flash", BIN, tile_size=256, resize=256,
              kwargs={**SCALED, **SWIGLU, "mlp_ratio": 2048 / 384}, tokens=14,
              licence="Apache-2.0; its card: for research alone", gated=True, non_commercial=True),
        # Xiang et al. 2025, "A vision-language foundation model for precision oncology"; class token, without its head
        _made("musk", "beit3_large_patch16_224", 1024, HUB + "xiangjx/musk", tile_size=384, input_size=384, tokens=24,
              kwargs={"img_size": 384, "dynamic_img_size": True, "global_pool": "token"}, **HALF, **NC_ND),
        # Zhou et al. 2026, "KEEP", knowledge-enhanced pretraining for cancer diagnosis
        _made("keep", vitl16, 768, HUB + "Astaxanthin/KEEP", kwargs=SCALED, head=(768, 768), unit_length=True,
              tile_size=256, tokens=14, licence="MIT"),
        # Filiot et al. 2023, "Scaling Self-Supervised Learning for Histopathology with Masked Image Modeling". The
        # authors' extractor loads the student; the transformers release is the entry "phikon".
        _made("ibot-vitb16", vitb16, 768, "https://github.com/owkin/HistoSSLscaling", "ibot_vit_base_pancan.pth",
              kwargs={**DYNAMIC, "img_size": 256}, tile_size=256, input_size=256, checkpoint_key="student",
              positions="scale", tokens=16, **OWKIN),
        _made("phikon", vitb16, 768, HUB + "owkin/phikon", BIN, kwargs=DYNAMIC, interpolation="bilinear", tokens=14,
              **OWKIN),
        # Filiot et al. 2024, "Phikon-v2, A large and public feature extractor for biomarker prediction"
        _made("phikon-v2", vitl16, 1024, HUB + "owkin/phikon-v2", kwargs=SCALED, tokens=14, **OWKIN),
        # Karasikov et al. 2025, "Training state-of-the-art pathology foundation models with orders of magnitude less
        # data"; Kaplan et al. 2025, OpenMidnight
        _made("midnight-12k", "vit_giant_patch14_dinov2", 3072, HUB + "kaiko-ai/midnight", pooling="token+avg",
              kwargs=GIANT, interpolation="bilinear", positions="size", tokens=16, licence="MIT", **HALF),
        _made("openmidnight", "vit_giant_patch14_reg4_dinov2", 1536, HUB + "SophontAI/OpenMidnight",
              "teacher_checkpoint_load.pt", kwargs=GIANT, interpolation="bilinear", tokens=16, gated=True, **APACHE),
        # Nechaev et al. 2024, "Hibou: A Family of Foundational Vision Transformers for Pathology"
        _made("hibou-b", "vit_base_patch14_reg4_dinov2", 768, HUB + "histai/hibou-b", tokens=16, gated=True,
              kwargs={**GIANT, **SWIGLU, "mlp_ratio": 5.33334}, positions="antialias", **HIBOU, **APACHE),
        _made("hibou-l", "vit_large_patch14_reg4_dinov2", 1024, HUB + "histai/hibou-L", tokens=16, gated=True,
              kwargs={**GIANT, **SWIGLU, "mlp_ratio": 5.34375}, positions="antialias", **HIBOU, **APACHE),
        # Ma et al. 2025, "A generalizable pathology foundation model using a unified knowledge distillation pretraining
        # framework" (GPFM); Xu et al. 2025, "A multimodal knowledge-enhanced whole-slide pathology foundation model"
        _made("gpfm", "vit_large_patch14_dinov2", 1024, HUB + "majiabo/GPFM", "GPFM.pth", kwargs=GIANT, tokens=16,
              licence="CC BY-NC-ND 4.0", non_commercial=True),
        _made("mstar", vitl16, 1024, HUB + "Wangyh/mSTAR", BIN, kwargs=SCALED, tile_size=256, interpolation="bilinear",
              tokens=14, **NC_ND),
        # Aben et al. 2024, "Towards Large-Scale Training of Pathology Foundation Models"
        *(
            _made(f"kaiko-{name}", arch, dim, KAIKO_HOME, f"{name}.pth", kwargs=DYNAMIC, interpolation="bilinear",
                  tile_size=256, tokens=tokens, **HALF, **KAIKO_NC)
            for name, arch, dim, tokens in (
                ("vits16", vits16, 384, 14), ("vits8", vits8, 384, 28),
                ("vitb16", vitb16, 768, 14), ("vitb8", vitb8, 768, 28),
            )
        ),
        _made("kaiko-vitl14", "vit_large_patch14_reg4_dinov2", 1024, KAIKO_HOME, "vitl14.pth", kwargs=GIANT,
              interpolation="bilinear", tile_size=256, positions="antialias", tokens=16, **HALF, **KAIKO_NC),
        # Wang et al. 2022, "Transformer-based unsupervised contrastive learning for histopathological image
        # classification" (resolution: as Filiot et al. 2023 used it, following its authors); Wang et al. 2024, "A
        # pathology foundation model for cancer diagnosis and prognosis prediction" (CHIEF)
        _made("ctranspath", "swin_tiny_patch4_window7_224", 768, "https://github.com/Xiyue-Wang/TransPath",
              "ctranspath.pth", kwargs={"embed_layer": "ConvStem"}, pooling="avg", mpp=1.0, interpolation="bilinear",
              checkpoint_key="model", tokens=7, **GPL_NC),
        _made("chief-ctranspath", "swin_tiny_patch4_window7_224", 768, "https://github.com/hms-dbmi/CHIEF",
              "CHIEF_CTransPath.pth", kwargs={"embed_layer": "ConvStem"}, pooling="avg", mpp=1.0, tile_size=256,
              interpolation="bilinear", checkpoint_key="model", tokens=7,
              licence="AGPL-3.0, for non-commercial academic purposes", non_commercial=True),
        # Wang et al. 2023, "RetCCL: Clustering-guided contrastive learning for whole-slide image retrieval"
        _made("retccl", "resnet50", 2048, "https://github.com/Xiyue-Wang/RetCCL", "best_ckpt.pth", pooling="avg",
              mpp=1.0, tile_size=256, input_size=256, interpolation="bilinear", tokens=8, **GPL_NC),
        # Chen et al. 2022, "Scaling Vision Transformers to Gigapixel Images via Hierarchical Self-Supervised Learning"
        _made("hipt-vits16", vits16, 384, "https://github.com/mahmoodlab/HIPT (HIPT_4K/Checkpoints, Git LFS)",
              "vit256_small_dino.pth", kwargs={**DYNAMIC, "img_size": 256}, tile_size=256, input_size=256,
              checkpoint_key="teacher", positions="scale", tokens=16, **HALF, **GPL_NC),
        # Kang et al. 2023, "Benchmarking Self-Supervised Learning on Diverse Pathology Datasets"
        *(
            _made(f"lunit-dino-vits{patch}", arch, 384, LUNIT_HOME, f"dino_vit_small_patch{patch}_ep200.torch",
                  kwargs=DYNAMIC, tokens=224 // patch, **LUNIT, **LUNIT_NC)
            for patch, arch in ((16, vits16), (8, vits8))
        ),
        *(
            _made(f"lunit-{name}", "resnet50", 2048, LUNIT_HOME, f"{name}_rn50_ep200.torch", pooling="avg", tokens=7,
                  **LUNIT, **LUNIT_NC)
            for name in ("bt", "mocov2", "swav")
        ),
        # Towers of images and text, of images of any scale. Huang et al. 2023, "A visual-language foundation model for
        # pathology image analysis using medical Twitter"; Ikezogwo et al. 2023, "Quilt-1M: One Million Image-Text Pairs
        # for Histopathology"; Zhang et al. 2023, "BiomedCLIP"
        _made("plip", "vit_base_patch32_clip_quickgelu_224", 512, HUB + "vinid/plip", BIN, mpp=None, head=(512,),
              head_bias=False, tokens=7, licence="none stated; its model card allows research and no deployed use",
              non_commercial=True, **OPENAI),
        *(
            _made(f"quiltnet-b-{patch}", f"vit_base_patch{patch}_clip_224", 512, f"{HUB}wisdomik/QuiltNet-B-{patch}",
                  "open_clip_pytorch_model.bin", mpp=None, head=(512,), head_bias=False, tokens=224 // patch,
                  licence="MIT; its model card: a research output", **OPENAI)
            for patch in (32, 16)
        ),
        _made("biomedclip", vitb16, 512, HUB + "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
              "open_clip_pytorch_model.bin", mpp=None, kwargs=DYNAMIC, head=(512,), head_bias=False, tokens=14,
              licence="MIT; its model card: for research only", **OPENAI),
        # Natural images: the conditioning of the NAIP model, and baselines. Oquab et al. 2023, "DINOv2"; the first
        # three stages of a ResNet-50 are the features of CLAM, Lu et al. 2021
        _made("vitb16-imagenet", vitb16, 768, HUB + "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k", kwargs=DYNAMIC,
              mpp=None, tokens=14, **HALF, **APACHE),
        _made("resnet50-imagenet", "resnet50", 2048, HUB + "timm/resnet50.a1_in1k", pooling="avg", mpp=None, tokens=7,
              **APACHE),
        _made("resnet50-truncated", "resnet50", 1024, HUB + "timm/resnet50.tv_in1k", pooling="avg", mpp=None, tokens=14,
              kwargs={"features_only": True, "out_indices": [3]}, tile_size=256, interpolation="bilinear",
              licence="BSD-3-Clause"),
        *(
            _made(f"dinov2-{size}", f"vit_{size}_patch14_dinov2", dim, f"{HUB}facebook/dinov2-{size}", mpp=None,
                  kwargs=GIANT, resize=256, positions="size", tokens=16, **APACHE)
            for size, dim in (("small", 384), ("base", 768), ("large", 1024), ("giant", 1536))
        ),
        # Kapse et al. 2026, GenBio-PathFM; Waiv 2026, Phaet and Mascaret
        *(
            EncoderSpec(name, "", licence, HUB + source, dim, gated=gated, non_commercial=True,
                        unloadable="its network is code that lies beside its weights (trust_remote_code)")
            for name, licence, source, dim, gated in (
                ("genbio-pathfm", "GenBio AI Community License", "genbio-ai/genbio-pathfm", 4608, False),
                ("phaet", "that of its model card, gated", "wearewaiv/phaet", 1024, True),
                ("mascaret", "that of its model card, gated", "wearewaiv/mascaret", 1536, True),
            )
        ),
    ]  # fmt: skip
    by_name = {spec.name: spec for spec in specs}
    for name in ("virchow2", "h0-mini", "midnight-12k"):
        whole = by_name[name]
        by_name[f"{name}-cls"] = replace(
            whole, name=f"{name}-cls", pooling="token", dim=whole.dim // 2, folder=whole.name
        )
    return by_name
