"""One loss term per file."""

from ldm import exports

__getattr__, __all__ = exports(
    __name__,
    adversarial="Adversarial Game Hinge NonSaturating",
    alignment="Alignment ConvHead Head MLPHead",
    contrastive="PairLoss Softmax",
    features="FeatureDistance",
    kl="KL",
    l1="L1",
    l2="L2",
    lpips="LPIPS",
    learned_variance="LearnedVariance",
    regularizers="LeCam R1 Regularizer",
    sigmoid="Sigmoid",
    term="LossTerm",
)
