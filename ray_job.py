"""The door: `python ray_job.py <job> [--config F] [--section.key value ...]`.

Run here, or on a cluster by `ray job submit --working-dir . -- python ray_job.py <job> ...`: the same line.
"""

from __future__ import annotations

import sys

from cluster.ablations_config import TrainAblationsJob
from cluster.cli import Job, main
from cluster.config import CompactJob, InspectJob, TreeRebuildGistsJob, TreeVerifyJob
from cluster.curation_config import CurateApplyJob, CuratePlanJob, CurateReportJob, CurateRestoreJob, CurateWatchJob
from cluster.curation_effect_config import CurateEffectJob
from cluster.demo_config import DemoJob
from cluster.evaluation_config import EvaluateFocusJob
from cluster.gist_evaluation_config import EvaluateGistJob
from cluster.headroom_config import EvaluateHeadroomJob
from cluster.key_training_config import TrainKeysJob
from cluster.label_config import LabelJob
from cluster.lens_training_config import TrainLensNetJob
from cluster.paper_config import PaperJob
from cluster.service_config import StoreStartJob, StoreStatusJob, StoreStopJob
from cluster.session_config import ChatJob
from cluster.task_evaluation_config import EvaluateTasksJob
from cluster.training_config import TrainGistNetJob
from cluster.tree_config import (
    TreeBackupJob,
    TreeBranchJob,
    TreeDeleteJob,
    TreeDiffJob,
    TreeExportJob,
    TreeGcJob,
    TreeImportJob,
    TreeLogJob,
    TreeRepairJob,
    TreeRollbackJob,
    TreeShowJob,
    TreeTagJob,
)
from cluster.tuning_config import EvaluateRetrievalJob

JOBS = (
    Job("demo", DemoJob, "pipelines.demo:run"),
    Job("chat", ChatJob, "pipelines.chat:run"),
    Job("compact", CompactJob, "pipelines.compact:run"),
    Job("inspect", InspectJob, "pipelines.inspect:run"),
    Job("evaluate gist", EvaluateGistJob, "pipelines.evaluate_gist:run"),
    Job("evaluate focus", EvaluateFocusJob, "pipelines.evaluate_focus:run"),
    Job("evaluate headroom", EvaluateHeadroomJob, "pipelines.evaluate_headroom:run"),
    Job("evaluate retrieval", EvaluateRetrievalJob, "pipelines.evaluate_retrieval:run"),
    Job("evaluate tasks", EvaluateTasksJob, "pipelines.evaluate_tasks:run"),
    Job("label", LabelJob, "pipelines.label:run"),
    Job("train gistnet", TrainGistNetJob, "pipelines.train_gistnet:run"),
    Job("train keys", TrainKeysJob, "pipelines.train_keys:run"),
    Job("train lensnet", TrainLensNetJob, "pipelines.train_lensnet:run"),
    Job("train ablations", TrainAblationsJob, "pipelines.train_ablations:run"),
    Job("paper 0", PaperJob, "pipelines.paper:run"),
    Job("store start", StoreStartJob, "pipelines.store:start"),
    Job("store status", StoreStatusJob, "pipelines.store:status"),
    Job("store stop", StoreStopJob, "pipelines.store:stop"),
    Job("tree verify", TreeVerifyJob, "pipelines.tree_verify:run"),
    Job("tree repair", TreeRepairJob, "pipelines.tree_repair:run"),
    Job("tree rebuild-gists", TreeRebuildGistsJob, "pipelines.tree_rebuild:run"),
    Job("tree export", TreeExportJob, "pipelines.tree_bundles:export"),
    Job("tree import", TreeImportJob, "pipelines.tree_bundles:import_"),
    Job("tree log", TreeLogJob, "pipelines.tree_versions:log"),
    Job("tree show", TreeShowJob, "pipelines.tree_versions:show"),
    Job("tree branch", TreeBranchJob, "pipelines.tree_versions:branch"),
    Job("tree tag", TreeTagJob, "pipelines.tree_versions:tag"),
    Job("tree diff", TreeDiffJob, "pipelines.tree_versions:diff"),
    Job("tree rollback", TreeRollbackJob, "pipelines.tree_versions:rollback"),
    Job("tree gc", TreeGcJob, "pipelines.tree_versions:gc"),
    Job("tree backup", TreeBackupJob, "pipelines.tree_backup:run"),
    Job("curate report", CurateReportJob, "pipelines.curate:report"),
    Job("curate plan", CuratePlanJob, "pipelines.curate:plan"),
    Job("curate apply", CurateApplyJob, "pipelines.curate:apply"),
    Job("curate effect", CurateEffectJob, "pipelines.curate_effect:run"),
    Job("curate restore", CurateRestoreJob, "pipelines.curate:restore_"),
    Job("curate watch", CurateWatchJob, "pipelines.curate:watch"),
    Job("tree delete", TreeDeleteJob, "pipelines.tree_removal:run"),
)

if __name__ == "__main__":
    sys.exit(main(JOBS))
