"""A bundle's towers on a cluster, and the steps that are predicted there."""

from __future__ import annotations

from dmt_convert.bundle.bundle import Bundle
from dmt_convert.config import PlanConfig
from dmt_convert.documents import to_text
from dmt_convert.families import read_model_options
from dmt_convert.files import (
    FIGURE_FILE,
    PLAN_FILE,
    check_distinct,
    check_output,
    staged_file,
    write_text,
)
from dmt_convert.placement import TowerPlan, make_cluster, make_machine, plan_model
from dmt_convert.placement.predict import PredictionReport, plot_scaling, predict_bundle


def plan_bundle(bundle: Bundle, config: PlanConfig) -> TowerPlan:
    """Place a bundle's towers on a cluster; write the plan if the settings say so.

    Raises:
        DmtError: The cluster cannot hold the towers, or the file cannot be written.
    """
    read_model_options(config)
    check_distinct(out=config.out, plot=config.plot)
    if config.out is not None:
        check_output(config.out, PLAN_FILE, models=[bundle.path], inputs=[config.model])
    if config.plot is not None:
        check_output(
            config.plot, FIGURE_FILE, models=[bundle.path], inputs=[config.model], option="--plot"
        )
    model = bundle.manifest.model
    plan = plan_model(model, make_cluster(config))
    if config.out is not None:
        write_text(config.out, to_text(plan.to_json()))
    return plan


def predict_plan(bundle: Bundle, plan: TowerPlan, config: PlanConfig) -> PredictionReport:
    """Predict the steps of a placed bundle; draw them if the settings say so.

    Raises:
        DmtError: The settings do not describe a machine, or the file cannot be written.
    """
    machine = make_machine(config, plan.cluster)
    report = predict_bundle(
        bundle.manifest.model,
        plan,
        machine,
        config.ids_per_bag or 1.0,
        predict=config.predict,
        scaling=config.predict_scaling,
    )
    if config.plot is not None and report.scaling is not None:
        with staged_file(config.plot) as staged:
            plot_scaling(report.scaling, machine.title, staged)
    return report
