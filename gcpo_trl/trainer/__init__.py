"""One training step: `GCPOTrainer`, and below it one class for each stage, each in its file.

trl.GRPOTrainer < ExactResume < MetricsTrainer < RolloutTrainer < CriticalTokenTrainer < DivergenceTrainer < GCPOTrainer

A class may use what lies below it, never what lies above. Methods of GRPOTrainer that are overridden, in the order in
which a run calls them, and by which classes, the lowest first. A call enters at the last class of its row, and each
class calls the one before it by ``super``:

    __init__                             GCPOTrainer
    train                                ExactResume GCPOTrainer
    _load_from_checkpoint                ExactResume
    _load_rng_state                      ExactResume
    _get_train_sampler                   ExactResume
    training_step                        MetricsTrainer
    _generate_and_score_completions      MetricsTrainer RolloutTrainer CriticalTokenTrainer
    _generate                            RolloutTrainer
    _calculate_rewards                   MetricsTrainer RolloutTrainer
    _compute_loss                        DivergenceTrainer GCPOTrainer
    _get_per_token_logps_and_entropies   MetricsTrainer GCPOTrainer
    evaluate                             RolloutTrainer
    _save_checkpoint                     ExactResume
    _save_rng_state                      ExactResume
    create_model_card                    GCPOTrainer
    push_to_hub                          GCPOTrainer
    _push_from_checkpoint                GCPOTrainer
"""

from .gcpo_trainer import GCPOTrainer

__all__ = ["GCPOTrainer"]
