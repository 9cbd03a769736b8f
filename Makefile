# From a fresh checkout:  make setup  (environment)   make demo  (train and evaluate a small model: minutes
# on a CPU)   make setup-openmmlab  (detection and segmentation)   make test  (all checks). Nothing is written
# outside this folder, apart from the package installer's own cache.
#
# To use an environment that exists already:  make test RUN=/path/to/bin/python SETUP=

PYTHON ?= python3
# more arguments for the installer, such as another package index
PIP_ARGS ?=
# threads of the demo's training: one, since more than there are free cores make it many times slower
OMP_NUM_THREADS ?= 1
# minutes that gpu-report may take
GPU_MINUTES ?= 12
# processes that share the files of tests: one for each processor
TEST_PROCESSES ?= auto
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(TEST_PROCESSES) --maxprocesses 8 \
	--dist loadfile --no-loadscope-reorder
VENV = .venv
RUN = $(VENV)/bin/python
SETUP = $(VENV)/.ready-dev
SETUP_OPENMMLAB = $(if $(SETUP),$(VENV)/.ready-openmmlab)

DEMO = demo
DEMO_RUN = $(DEMO)/output/demo/train
DEMO_EVAL = $(DEMO)/output/demo/eval
DEMO_LEAST = 95
DETECTION_RUN = $(DEMO)/output/detection
DETECTION_CONFIG = detection/configs/demo_mask_rcnn.py
DETECTION_LEAST = 0.5
SEGMENTATION_RUN = $(DEMO)/output/segmentation
SEGMENTATION_CONFIG = segmentation/configs/demo_upernet.py
SEGMENTATION_LEAST = 50

.PHONY: help setup setup-openmmlab setup-detection setup-segmentation demo demo-detection demo-segmentation test \
	test-fast gpu-report clean distclean

help:
	@echo 'make setup      create .venv with what the code needs (PYTHON=... names another interpreter)'
	@echo 'make demo       train a small model on handwritten digits, evaluate it, plot the run'
	@echo 'make setup-openmmlab   add what detection/ and segmentation/ need to it'
	@echo 'make demo-detection    train Mask R-CNN on scenes of digits, evaluate it, draw what it finds'
	@echo 'make demo-segmentation   train UPerNet on such scenes, evaluate it, colour what it finds'
	@echo 'make test       ruff, mypy and pytest'
	@echo 'make test-fast  the tests of the network, options and data, and a small run, in two minutes'
	@echo 'make gpu-report check and time the kernels and the models on a GPU, into tools/results (GPU_MINUTES=12)'
	@echo 'make clean      remove the demo and caches; output/ stays'
	@echo 'make distclean  remove .venv as well'

setup: $(VENV)/.ready
	@echo 'ready: $(VENV)/bin/python main.py --help'

# How the environment is filled: with uv where there is one, else with pip.
INSTALL = set -e; \
	if command -v uv >/dev/null 2>&1; then uv pip install --python $(VENV)/bin/python $(PIP_ARGS) $$what; \
	else $(VENV)/bin/python -m pip install $(PIP_ARGS) $$what; fi

$(VENV)/.ready: requirements.txt
	@set -e; \
	is_new() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }; \
	if ! is_new $(VENV)/bin/python; then \
		found=; \
		for name in '$(PYTHON)' python3.13 python3.12 python3.11 python3.10 python3.14 python3 python; do \
			if is_new "$$name"; then found=$$name; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo 'error: Python 3.10 or newer is needed, and none was found; install one, or name it: make setup PYTHON=/path/to/python3' >&2; \
			exit 1; \
		fi; \
		[ "$$found" = '$(PYTHON)' ] || echo '$(PYTHON) is missing or older than Python 3.10'; \
		echo "creating $(VENV) with $$found"; \
		rm -rf $(VENV); \
		if command -v uv >/dev/null 2>&1; then uv venv --python "$$found" $(VENV); \
		elif ! "$$found" -m venv $(VENV); then \
			rm -rf $(VENV); \
			echo "error: $$found cannot create environments; install its venv package (python3-venv on Debian), or uv" >&2; \
			exit 1; \
		fi; \
	fi
	@what='-r requirements.txt'; $(INSTALL)
	@touch $@

$(VENV)/.ready-dev: requirements-dev.txt $(VENV)/.ready
	@what='-r requirements-dev.txt'; $(INSTALL)
	@touch $@

setup-openmmlab setup-detection setup-segmentation: $(VENV)/.ready-openmmlab
	@echo 'ready: $(VENV)/bin/python detection/train.py --help'

# mmcv's operators take most of an hour to compile, so mmcv-lite comes without them (openmmlab/mmcv_ops.py
# stands in), unless an mmcv is there. Its own wish for mmengine would put the unmaintained one into its place.
$(VENV)/.ready-openmmlab: detection/requirements.txt $(VENV)/.ready
	@what='-r detection/requirements.txt'; $(INSTALL)
	@$(VENV)/bin/python -c 'import mmcv' 2>/dev/null || { what='--no-deps mmcv-lite==2.1.0'; $(INSTALL); }
	@touch $@

# The demo's settings come from its own files alone, so an output folder set in the environment is put aside.
demo: $(SETUP)
	@rm -rf $(DEMO_RUN) $(DEMO_EVAL)
	$(RUN) -m data.demo $(DEMO) --kinds imagenet
	PT_OUTPUT_DIR= OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(RUN) main.py --cfg configs/demo.yaml \
		--data-path $(DEMO)/imagenet --output $(DEMO)/output --tag train
	PT_OUTPUT_DIR= OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(RUN) main.py --cfg configs/demo.yaml \
		--data-path $(DEMO)/imagenet --output $(DEMO)/output --tag eval --eval --resume $(DEMO_RUN)/best.pth
	$(RUN) -m tools.plot_run $(DEMO_RUN) --out $(DEMO_RUN)/plot.png
	@top1=$$(sed -n 's/.*images: acc1 \([0-9.]*\)%.*/\1/p' $(DEMO_EVAL)/log_rank0.txt | tail -n 1); \
	echo; \
	echo "checkpoint  $(DEMO_RUN)/best.pth"; \
	echo "log         $(DEMO_RUN)/log_rank0.txt"; \
	echo "plot        $(DEMO_RUN)/plot.png"; \
	echo "top-1       $$top1 % of the held-out digits"; \
	if ! awk -v got="$$top1" 'BEGIN { exit !(got != "" && got + 0 >= $(DEMO_LEAST)) }'; then \
		echo 'error: the demo is expected to reach $(DEMO_LEAST) % top-1' >&2; exit 1; \
	fi

demo-detection: $(SETUP) $(SETUP_OPENMMLAB)
	@rm -rf $(DETECTION_RUN)
	$(RUN) -m data.demo $(DEMO) --kinds detection
	DEMO=$(DEMO) OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(RUN) detection/train.py $(DETECTION_CONFIG) \
		--work-dir $(DETECTION_RUN)/train
	DEMO=$(DEMO) OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(RUN) detection/test.py $(DETECTION_CONFIG) \
		$(DETECTION_RUN)/train/best_*.pth --work-dir $(DETECTION_RUN)/test
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(RUN) detection/predict.py $(DEMO)/detection/val2017/00000000000[1-4].jpg \
		--config $(DETECTION_CONFIG) --checkpoint $(DETECTION_RUN)/train/best_*.pth --out $(DETECTION_RUN)/pictures
	@ap() { sed -n "s/.*coco\/$$1: \([0-9.]*\) .*/\1/p" $(DETECTION_RUN)/test/*/*.log | tail -n 1; }; \
	box=$$(ap bbox_mAP_50); \
	echo; \
	echo "checkpoint  $$(ls $(DETECTION_RUN)/train/best_*.pth)"; \
	echo "pictures    $(DETECTION_RUN)/pictures/"; \
	echo "box AP      $$(ap bbox_mAP), at IoU 0.5 $$box"; \
	echo "mask AP     $$(ap segm_mAP), at IoU 0.5 $$(ap segm_mAP_50)"; \
	if ! awk -v got="$$box" 'BEGIN { exit !(got != "" && got + 0 > $(DETECTION_LEAST)) }'; then \
		echo 'error: the demo is expected to pass a box AP of $(DETECTION_LEAST) at IoU 0.5' >&2; exit 1; \
	fi

demo-segmentation: $(SETUP) $(SETUP_OPENMMLAB)
	@rm -rf $(SEGMENTATION_RUN)
	$(RUN) -m data.demo $(DEMO) --kinds segmentation
	DEMO=$(DEMO) OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(RUN) segmentation/train.py $(SEGMENTATION_CONFIG) \
		--work-dir $(SEGMENTATION_RUN)/train
	DEMO=$(DEMO) OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(RUN) segmentation/test.py $(SEGMENTATION_CONFIG) \
		$(SEGMENTATION_RUN)/train/best_*.pth --work-dir $(SEGMENTATION_RUN)/test
	DEMO=$(DEMO) OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(RUN) segmentation/test.py $(SEGMENTATION_CONFIG) \
		$(SEGMENTATION_RUN)/train/best_*.pth --work-dir $(SEGMENTATION_RUN)/test-multi-scale --multi-scale
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(RUN) segmentation/predict.py \
		$(DEMO)/segmentation/images/validation/0000000[1-4].jpg --config $(SEGMENTATION_CONFIG) \
		--checkpoint $(SEGMENTATION_RUN)/train/best_*.pth --out $(SEGMENTATION_RUN)/pictures
	@miou() { sed -n 's/.* mIoU: \([0-9.]*\) .*/\1/p' $(SEGMENTATION_RUN)/$$1/*/*.log | tail -n 1; }; \
	single=$$(miou test); \
	echo; \
	echo "checkpoint  $$(ls $(SEGMENTATION_RUN)/train/best_*.pth)"; \
	echo "pictures    $(SEGMENTATION_RUN)/pictures/"; \
	echo "mIoU        $$single %, at several scales $$(miou test-multi-scale) %"; \
	if ! awk -v got="$$single" 'BEGIN { exit !(got != "" && got + 0 > $(SEGMENTATION_LEAST)) }'; then \
		echo 'error: the demo is expected to pass a mIoU of $(SEGMENTATION_LEAST) %' >&2; exit 1; \
	fi

test: $(SETUP) $(SETUP_OPENMMLAB)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(PYTEST)

# what an edit of the network, the options or the data is likely to break, in two minutes
FAST_TESTS = models ops config optimizer data checkpoint golden main
test-fast: $(SETUP)
	$(PYTEST) $(FAST_TESTS:%=tests/test_%.py) -k 'not _small_ and not _base_'

gpu-report: $(SETUP)
	$(RUN) -m tools.benchmarks.gpu_report --minutes $(GPU_MINUTES)

clean:
	rm -rf $(DEMO) .pytest_cache .ruff_cache .mypy_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
