# What a fresh checkout can do. `make demo` and `make test` set up everything that they need.

PYTHON   := .venv/bin/python
RESULTS  := .work/results
JUNIT    := $(RESULTS)/junit
SOURCES  := $(shell find chv -name '*.pyx' -o -name '*.pxd' -o -name '*.py')
COMPILED := $(filter %.pyx %.pxd,$(SOURCES))
PYTEST   := $(PYTHON) -m pytest -q -o timeout=240
# Runs a command where /dev/kvm runs Linux: here if it does, else in the testbed.
LINUX    := $(PYTHON) -m tests.testbed --if-needed linux --results $(RESULTS) --modules tun --
# The same for what needs no more than a /dev/kvm that opens.
KVM      := $(PYTHON) -m tests.testbed --if-needed kvm --results $(RESULTS) --

export PYTHONDONTWRITEBYTECODE=

SHELL := /bin/bash

.PHONY: help setup build images image firmware demo demo-hotplug demo-image demo-firmware test lint test-unit test-kvm test-linux test-linux-1 test-linux-2 test-firmware test-asan test-fuzz fuzz test-pythons bench clean distclean

help:
	@echo 'make demo          the whole story, in two parts: demo-hotplug, then demo-image and demo-firmware'
	@echo 'make demo-hotplug  boot Debian with 4 vCPUs, add 4, bring them online, reboot: 2 minutes'
	@echo 'make demo-image    boot a disk image without firmware, over the network: add 4 vCPUs, reboot'
	@echo 'make demo-firmware the same with EDK2'
	@echo 'make test          everything below, with one summary at the end'
	@echo 'make setup         Debian packages, virtual environment, guest kernels (the others do this first)'
	@echo 'make build         compile what changed in chv'
	@echo 'make images        a disk image to boot, and firmware for it: 7 minutes the first time'
	@echo 'make lint          ruff and mypy'
	@echo 'make test-unit     no /dev/kvm needed'
	@echo 'make test-asan     what is compiled, with AddressSanitizer and UBSan'
	@echo 'make test-fuzz     a minute of each fuzzer; make fuzz SECONDS_EACH=600: ten'
	@echo 'make test-kvm      /dev/kvm and tiny guests'
	@echo 'make test-linux    Linux guests, in the testbed where /dev/kvm cannot run them'
	@echo 'make test-firmware EDK2 boots the disk image, in the testbed likewise'
	@echo 'make test-pythons  build a wheel and run the unit tests with every Python >= 3.11 of this machine'
	@echo 'make bench         all benchmarks, results and pictures in .work/bench (BENCH=exits QUICK=--quick: a look at one)'
	@echo 'make clean         remove what was built; distclean also what was downloaded and the environment'

setup:
	@tools/setup.sh

build: setup .venv/build.stamp

.venv/build.stamp: $(COMPILED) setup.py
	@echo 'build: the compiled modules of chv'
	@mkdir -p .cache/logs
	@$(PYTHON) setup.py -q build_ext --inplace >.cache/logs/build.log 2>&1 || { tail -n 60 .cache/logs/build.log; exit 1; }
	@touch $@

# What the tests of disk images boot: made once, then kept in .cache.
images: setup
	@$(MAKE) --no-print-directory -j2 image firmware

image: setup
	@nice $(PYTHON) -m tests.images

firmware: setup
	@nice tools/cloudhv.sh >/dev/null

demo: build
	@MAKE='$(MAKE)' tools/demo.sh

demo-hotplug: build
	@$(PYTHON) -m compileall -q chv examples tests
	@$(LINUX) $(PYTHON) -u -m examples.hotplug_demo \
	    --kernel .cache/guests/6.12/bzImage --initramfs .cache/guests/6.12/initramfs

demo-image: build image
	@set -o pipefail; $(call image_demo,image,) | sed -u 's/^/[no firmware] /'

demo-firmware: build images
	@set -o pipefail; $(call image_demo,firmware,--firmware .cache/firmware/CLOUDHV.fd) | sed -u 's/^/[EDK2] /'

# The copy is written to, and lies in memory: in the testbed nothing else can be written.
define image_demo
$(PYTHON) -m compileall -q chv examples tests && \
$(LINUX) sh -c 'cp --sparse=always .cache/images/clear.img /dev/shm/chv-demo-$(1).img && chmod 600 /dev/shm/chv-demo-$(1).img && \
    $(PYTHON) -u -m examples.image_demo --disk /dev/shm/chv-demo-$(1).img --key .cache/images/id_ed25519 $(2) \
    --address 192.168.249.2 --gateway 192.168.249.1; status=$$?; rm -f /dev/shm/chv-demo-$(1).img; exit $$status'
endef

test: setup
	@$(PYTHON) -m tests.report images lint test-unit test-asan test-fuzz test-kvm test-linux test-firmware test-pythons

lint: build
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check chv examples tests benchmarks setup.py
	$(PYTHON) -m mypy --strict

test-unit: build
	@mkdir -p $(JUNIT)
	$(PYTEST) -n 2 tests/unit --junitxml=$(JUNIT)/test-unit.xml

test-kvm: build
	@mkdir -p $(JUNIT)
	$(KVM) $(PYTEST) tests/kvm --junitxml=$(JUNIT)/test-kvm.xml

# In two halves at the same time: a testbed has one CPU.
# Compiled here, where it is quick: bytecode of the package and, by collecting them once, of the tests.
test-linux: build
	@mkdir -p $(JUNIT)
	@$(PYTHON) -m compileall -q chv examples tests
	@$(PYTEST) --collect-only tests/linux >/dev/null || true
	@$(MAKE) --no-print-directory --keep-going -j2 test-linux-1 test-linux-2

test-linux-1 test-linux-2: test-linux-%:
	@set -o pipefail; $(LINUX) $(PYTHON) -m pytest tests/linux --part $*/2 -v --junitxml=$(JUNIT)/test-linux-$*.xml \
	    -m 'not firmware' --chv-logs=$(RESULTS)/consoles 2>&1 | sed -u 's/^/[$*] /'

# In a testbed of its own: it has most to do.
test-firmware: build
	@mkdir -p $(JUNIT)
	@$(PYTHON) -m compileall -q chv examples tests
	@$(PYTHON) -m tests.testbed --tries 2 --if-needed linux --results $(RESULTS) --modules tun -- \
	    $(PYTHON) -m pytest tests/linux -m firmware -v --junitxml=$(JUNIT)/test-firmware.xml --chv-logs=$(RESULTS)/consoles

# The unit tests of compiled modules, and a while of each fuzzer, with AddressSanitizer and UBSan looking on.
ASAN_TESTS := $(addprefix tests/unit/test_,bus irq pci_bus virtqueue_ring virtqueue_api virtqueue_notify virtio_block \
    virtio_net_data virtio_rng virtio_pci virtio_transport virtio_transport_life serial_registers serial_model \
    debug_port pm_timer)

test-asan: build
	@mkdir -p $(JUNIT)
	$(PYTHON) -m tests.sanitized address -- pytest -q -n 2 -o timeout=240 -k 'not takes_no_memory' $(addsuffix .py,$(ASAN_TESTS)) \
	    -p no:cacheprovider --junitxml=$(abspath $(JUNIT))/test-asan.xml
	$(PYTHON) -m tests.fuzz --build address --seconds 10 virtqueue block net pci

# SECONDS_EACH: how long each fuzzer has. Compiled code counts its edges.
SECONDS_EACH := 60
fuzz: build
	$(PYTHON) -m tests.fuzz --seconds $(SECONDS_EACH)

test-fuzz: build
	$(PYTHON) -m tests.fuzz --seconds 60 --junitxml $(JUNIT)/test-fuzz.xml

test-pythons: build
	@tools/test_pythons.sh $(JUNIT)

# BENCH: names of benchmarks, default all; QUICK=--quick for a look.
bench: build images
	@$(PYTHON) -m compileall -q chv tests benchmarks
	$(PYTHON) -m benchmarks $(QUICK) --output .work/bench $(BENCH)

clean:
	rm -rf build dist *.egg-info .work .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find chv -name '*.so' -delete -o -name '*.c' -delete -o -name '*.html' -delete
	find . -path ./.venv -prune -o -path ./.cache -prune -o -name __pycache__ -print0 | xargs -0 rm -rf
	rm -f .venv/build.stamp

distclean: clean
	rm -rf .venv .cache
