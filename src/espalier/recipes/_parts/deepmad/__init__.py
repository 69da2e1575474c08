"""DeepMAD's analytic design (Shen et al., CVPR 2023) as programs of allocation."""
