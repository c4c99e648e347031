"""What the chapters refer to: one list for all of them, at the report's end."""

from __future__ import annotations

import re

ARXIV = {
    "1506.02438": "J. Schulman et al. High-Dimensional Continuous Control Using Generalized "
    "Advantage Estimation. 2015",
    "1706.04599": "C. Guo et al. On Calibration of Modern Neural Networks. 2017",
    "1707.06347": "J. Schulman et al. Proximal Policy Optimization Algorithms. 2017",
    "1909.08593": "D. Ziegler et al. Fine-Tuning Language Models from Human Preferences. 2019",
    "2106.09685": "E. Hu et al. LoRA: Low-Rank Adaptation of Large Language Models. 2021",
    "2203.02155": "L. Ouyang et al. Training language models to follow instructions with human "
    "feedback. 2022",
    "2204.05862": "Y. Bai et al. Training a Helpful and Harmless Assistant with Reinforcement "
    "Learning from Human Feedback. 2022",
    "2210.10760": "L. Gao, J. Schulman, J. Hilton. Scaling Laws for Reward Model "
    "Overoptimization. 2022",
    "2304.06767": "H. Dong et al. RAFT: Reward rAnked FineTuning for Generative Foundation Model "
    "Alignment. 2023",
    "2305.18290": "R. Rafailov et al. Direct Preference Optimization: Your Language Model is "
    "Secretly a Reward Model. 2023",
    "2307.09288": "H. Touvron et al. Llama 2: Open Foundation and Fine-Tuned Chat Models. 2023",
    "2310.02743": "T. Coste et al. Reward Model Ensembles Help Mitigate Overoptimization. 2023",
    "2310.03716": "P. Singhal et al. A Long Way to Go: Investigating Length Correlations in "
    "RLHF. 2023",
    "2310.12036": "M. Azar et al. A General Theoretical Paradigm to Understand Learning from "
    "Human Preferences. 2023",
    "2312.09244": "J. Eisenstein et al. Helping or Herding? Reward Model Ensembles Mitigate but "
    "do not Eliminate Reward Hacking. 2023",
    "2401.01879": "A. Beirami et al. Theoretical guarantees on the best-of-n alignment policy. "
    "2024",
    "2402.01306": "K. Ethayarajh et al. KTO: Model Alignment as Prospect Theoretic Optimization. "
    "2024",
    "2402.03300": "Z. Shao et al. DeepSeekMath: Pushing the Limits of Mathematical Reasoning in "
    "Open Language Models. 2024",
    "2402.04792": "S. Guo et al. Direct Language Model Alignment from Online AI Feedback. 2024",
    "2402.14740": "A. Ahmadian et al. Back to Basics: Revisiting REINFORCE Style Optimization for "
    "Learning from Human Feedback in LLMs. 2024",
    "2403.07691": "J. Hong, N. Lee, J. Thorne. ORPO: Monolithic Preference Optimization without "
    "Reference Model. 2024",
    "2404.04475": "Y. Dubois et al. Length-Controlled AlpacaEval: A Simple Way to Debias "
    "Automatic Evaluators. 2024",
    "2405.14734": "Y. Meng, M. Xia, D. Chen. SimPO: Simple Preference Optimization with a "
    "Reference-Free Reward. 2024",
    "2411.15124": "N. Lambert et al. Tulu 3: Pushing Frontiers in Open Language Model "
    "Post-Training. 2024",
    "2503.14476": "Q. Yu et al. DAPO: An Open-Source LLM Reinforcement Learning System at Scale. "
    "2025",
    "2503.20783": "Z. Liu et al. Understanding R1-Zero-Like Training: A Critical Perspective. 2025",
    "2506.13585": "A. Chen et al. MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning "
    "Attention. 2025",
    "2507.18071": "C. Zheng et al. Group Sequence Policy Optimization. 2025",
}
PRINTED = (
    "R. A. Bradley, M. E. Terry. Rank Analysis of Incomplete Block Designs: I. The Method of "
    "Paired Comparisons. Biometrika 39, 1952",
    "S. Holm. A Simple Sequentially Rejective Multiple Test Procedure. Scandinavian Journal of "
    "Statistics 6, 1979",
    "M. P. Naeini, G. F. Cooper, M. Hauskrecht. Obtaining Well Calibrated Probabilities Using "
    "Bayesian Binning. AAAI 2015",
    "J. Schulman. Approximating KL Divergence. 2020, joschu.net/blog/kl-approx.html",
)


def markdown() -> str:
    """All of them as a list, in the order of their first authors."""
    lines = [f"{text}. arXiv:{number}" for number, text in ARXIV.items()] + list(PRINTED)
    return "\n".join(f"- {line}." for line in sorted(lines, key=_surname))


def _surname(line: str) -> str:
    return re.sub(r"^(?:[A-Z]\. )+", "", line).lower()
