"""The papers, as pure functions on named tensors: torch only, no config, no trainer, no model.

    prompt -> rollout -> reward -> advantages -> critical tokens -> weight -> loss
                                                 ^^^^^^^^^^^^^^^    ^^^^^^    ^^^^

Group Critical-token Policy Optimization (GCPO), sentence by sentence:

* Eq. 1, token entropy                                signals.entropy
* Eq. 4, causal local mean of the entropy map         spatial.causal_neighborhood_mean
* sec. 5.1, central difference of that map            spatial.gradient_magnitude
* Eq. 5, mean cosine similarity inside a group        signals.group_similarity
* Eq. 6, the critical tokens                          selection.critical_tokens, one file a criterion
* Eq. 7, dynamic advantage weight                     weighting.advantage_weight
* Eq. 8, the objective                                loss.gcpo_loss

Beside the paper: how much the images of a prompt differ, diversity.

Everything is computed in fp32, whatever the dtype of the model. Import from the module, not from here.
"""
