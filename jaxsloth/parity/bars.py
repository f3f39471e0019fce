"""The bars of the parity ladder. None is loosened without an entry in docs/decisions.md."""

L0_DIFFERING_ELEMENTS = 0
L0_OFFSET_RELATIVE = 1e-6  # float32 means differ by the order of summation

L1_SHARE_OF_TOLERANCE = 1.0  # error over the tolerance in the op's contract

L2_MAX_ABS = 1e-3
L2_TOP2_GAP = 2e-3
L2_TOP1_DISAGREEMENTS = 0

L3_RELATIVE_FROBENIUS = 1e-4

L4_STEPS = 50
L4_BACKENDS = 1e-5
L4_JUDGE = 5e-5
L4_LOSS_MUST_MOVE = 0.3

L6_MAX_ABS = 1e-3
