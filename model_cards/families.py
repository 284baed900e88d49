# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""What a card says of a family whatever the run: its name, how it learns, and the papers to cite."""

from __future__ import annotations

from typing import NamedTuple


class Paper(NamedTuple):
    """A paper, as BibTeX cites it."""

    key: str
    title: str
    authors: str
    venue: str
    year: int
    arxiv: str

    def bibtex(self) -> str:
        """An `inproceedings` entry, or `misc` for what is on arXiv alone."""
        kind = "inproceedings" if self.venue else "misc"
        fields = {"title": f"{{{self.title}}}", "author": self.authors, "booktitle": self.venue, "year": self.year}
        fields |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        lines = ",\n".join(f"  {name:<13} = {{{value}}}" for name, value in fields.items() if value)
        return f"@{kind}{{{self.key},\n{lines}\n}}"


class Family(NamedTuple):
    """A family's name, what it does, and its papers, its own first."""

    title: str
    method: str
    papers: tuple[Paper, ...]


MAE_PAPER = Paper(
    "he2022masked",
    "Masked Autoencoders Are Scalable Vision Learners",
    r"He, Kaiming and Chen, Xinlei and Xie, Saining and Li, Yanghao and Doll{\'a}r, Piotr and Girshick, Ross",
    "IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)",
    2022,
    "2111.06377",
)
CL_MAE_PAPER = Paper(
    "madan2024clmae",
    "CL-MAE: Curriculum-Learned Masked Autoencoders",
    r"Madan, Neelu and Ristea, Nicolae-C{\u{a}}t{\u{a}}lin and Nasrollahi, Kamal and Moeslund, Thomas B. and "
    "Ionescu, Radu Tudor",
    "IEEE/CVF Winter Conference on Applications of Computer Vision (WACV)",
    2024,
    "2308.16572",
)
CMAE_PAPER = Paper(
    "mao2022improvements",
    "Improvements to Self-Supervised Representation Learning for Masked Image Modeling",
    "Mao, Jiawei and Yin, Xuesong and Chang, Yuanqi and Zhou, Honggu",
    "",
    2022,
    "2205.10546",
)
CONTRASTIVE_CROP_PAPER = Paper(
    "peng2022crafting",
    "Crafting Better Contrastive Views for Siamese Representation Learning",
    "Peng, Xiangyu and Wang, Kai and Zhu, Zheng and Wang, Mang and You, Yang",
    "IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)",
    2022,
    "2202.03278",
)

_MAE = Family(
    "MAE",
    "a masked autoencoder: it sees a part of an image's patches, chosen at random, and reconstructs the others",
    (MAE_PAPER,),
)
FAMILIES = {
    "mae": _MAE,
    "vit_mae": _MAE,
    "cl_mae": Family(
        "CL-MAE",
        "a masked autoencoder whose masks are chosen by a masking module, under a curriculum that turns it from "
        "partner to adversary",
        (CL_MAE_PAPER, MAE_PAPER),
    ),
    "cmae": Family(
        "CMAE",
        "a masked autoencoder with tasks for the encoder itself: contrast between two views of an image, and where "
        "its patches lie (this project's reading of the paper)",
        (CMAE_PAPER, MAE_PAPER),
    ),
}

__all__ = ["CONTRASTIVE_CROP_PAPER", "FAMILIES", "Family", "Paper"]
