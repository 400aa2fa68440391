"""The planner: each question is a pure function to a dataclass; `qatlaw.cli` asks them from the command line.

    run.plan_run                  a run (N, D), B -> fraction, token counts, switch step, loss, waste of the 10 % rule
    run.compare_widths            a run (N, D) -> QAT at each B against full precision
    run.judge_split               the cost of a QAT fraction in loss and tokens
    memory.plan_memory            a memory budget, D -> the best N and B
    budget.plan_budget            N, B, FLOPs or GPU-hours -> the compute-optimal fraction
    checkpoint.plan_checkpoint    D_fp spent already, N, B -> the QAT tokens they deserve, and what each buys
    waste.fusion_saving           the gain of fusing QAT with the cooldown

Without a law (`qatlaw.planner_law`), the closed form answers as far as it can.
"""
