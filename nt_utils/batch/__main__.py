from nt_utils.batch import main

raise SystemExit(main())
