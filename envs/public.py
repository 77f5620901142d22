"""The public names of `vlmenv.envs`, which imports them when the first one is used."""

from vlmenv.core.answers import NONE, Answer, Caption, Detection
from vlmenv.core.coordinates import Box, Coordinates, CoordinateSpace, Point, ResizeRule, iou
from vlmenv.core.errors import ConfigError, DataError, RewardError
from vlmenv.core.formats import AnswerFormat
from vlmenv.core.rollout import Observation
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.data.rows import Row
from vlmenv.envs.data.scenes import Reference, Scene, Scenes, Shape, Split, choose_reference, sample_scene
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.episodes import Reply
from vlmenv.envs.geometry import BOX, BOXES, DETECTIONS, POINT, POINTS, Geometry
from vlmenv.envs.hosted import HostedTask
from vlmenv.envs.metrics.intervals import Interval, metric_interval, paired_interval, ratio_interval
from vlmenv.envs.registration import register_task
from vlmenv.envs.rewards.boxes import iou_reward
from vlmenv.envs.rewards.clip import ClipScore
from vlmenv.envs.rewards.judge import Judge
from vlmenv.envs.rewards.registry import register_reward
from vlmenv.envs.rewards.terms import BatchTerm, RewardTerm
from vlmenv.envs.rewards.text import format_reward, length_reward
from vlmenv.envs.selfcheck import self_check
from vlmenv.envs.vector import VisualTaskVectorEnv

__all__ = [
    "BOX",
    "BOXES",
    "DETECTIONS",
    "NONE",
    "POINT",
    "POINTS",
    "Answer",
    "AnswerFormat",
    "BatchTerm",
    "Box",
    "Caption",
    "ClipScore",
    "ConfigError",
    "CoordinateSpace",
    "Coordinates",
    "DataError",
    "Detection",
    "Geometry",
    "HostedTask",
    "Interval",
    "Judge",
    "Observation",
    "Point",
    "Reference",
    "Reply",
    "ResizeRule",
    "RewardError",
    "RewardTerm",
    "Row",
    "Sample",
    "Scene",
    "Scenes",
    "Shape",
    "Source",
    "Split",
    "VisualTaskEnv",
    "VisualTaskVectorEnv",
    "choose_reference",
    "format_reward",
    "iou",
    "iou_reward",
    "length_reward",
    "metric_interval",
    "paired_interval",
    "ratio_interval",
    "register_reward",
    "register_task",
    "sample_scene",
    "self_check",
]
